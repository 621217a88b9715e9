"""The OpenAI API of the engine's own: completions, chats and scores over HTTP, on the same calls as
gRPC."""
