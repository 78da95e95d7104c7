"""The roofline: a device's time per decode step, computed from its figures (`specache plan --gpu`,
docs/plan.md).
"""
