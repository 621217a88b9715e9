"""The gRPC service: messages, errors, calls, and the life of the server."""
