"""The command line: one file a verb. Prints and maps errors to exit codes; decides nothing."""
