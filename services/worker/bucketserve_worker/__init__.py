"""The worker service: one engine on one device, its reports, its token streams."""
