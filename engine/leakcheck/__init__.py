"""`octavo leakcheck`: the published attacks on shared prompt caches, against one's own server.

Read `channels` for the attacks, `trials` for their order, `statistics` and `verdicts` for what
follows from what they saw.
"""
