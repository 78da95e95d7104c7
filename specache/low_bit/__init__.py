"""The low-bit copy: byte layout of a page (`layout`), the pool that pages come from and page tables (`pool`)."""
