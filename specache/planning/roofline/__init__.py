"""Time per decode step of a device, computed from its figures: what `specache plan --gpu` prints (docs/plan.md)."""
