"""Decode steps on a GPU: static buffers, two queues ordered by events, and no waiting on the host.

Everything here also runs on the CPU, where tests run the two queues in any order that their events
allow.
"""
