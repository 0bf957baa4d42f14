"""Competing policies, each as strong as its authors made it, behind the same step(events, now_s) as the core."""
