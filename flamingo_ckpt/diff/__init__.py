"""What differs between two sides: `sides` names them alike, `compare` sorts the keys."""
