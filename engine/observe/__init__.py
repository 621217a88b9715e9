"""What can be seen of an engine at work: times of requests, log lines, traces. Never a prompt, a
token, a salt or a key."""
