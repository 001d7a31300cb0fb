"""An engine elsewhere: a client of servers that speak OpenAI's protocol."""
