"""Reports: self-contained HTML pages and the figures on them."""
