"""The command line: local stack, one service at a time, a client, the simulator."""
