"""Documents: pages out of untrusted files, lines found and read page by page, and the files written of the result."""
