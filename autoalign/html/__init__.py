"""The HTML report: a page of its own for a browser, and a short form for notebooks."""
