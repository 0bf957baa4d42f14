"""The gateway service: the API, tokenising, the clients' streams. It owns the tokens already sent of each request."""
