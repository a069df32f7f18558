"""Weight files: read any of them, load them strictly, convert between the layouts of the field's libraries."""
