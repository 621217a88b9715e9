"""`octavo top`: a server's figures in the terminal, as they change."""
