"""Where the 16-bit rows live. One small interface (`base`), one file per tier."""
