"""The evaluation suite: tasks and methods from two registries, measured side by side over one shared prefill."""
