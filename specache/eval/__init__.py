"""The evaluation suite: tasks and methods by name, measured over one shared prefill per item."""
