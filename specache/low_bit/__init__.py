"""The low-bit copy: byte layout of a page (`layout`), page pool and page tables (`pool`)."""
