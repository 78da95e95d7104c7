"""The GPU engine: static buffers, two queues ordered by events, and rows that reach the device without the host waiting for it.

Everything here also runs on the CPU, where a test can have the two queues run in any order that their events allow.
"""
