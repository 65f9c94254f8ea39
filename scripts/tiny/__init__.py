"""Parts of train_tiny.py, which trains the bundled model nf-tiny; nothing here is imported by the package nf."""
