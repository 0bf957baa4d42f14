"""gRPC plumbing shared by the services: server lifecycle, channels, errors, conversion. No service logic."""
