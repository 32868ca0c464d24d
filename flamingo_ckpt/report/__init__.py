"""Reports: dataclasses first; JSON, text and Markdown are renderings of them. Computes nothing."""
