"""From a recipe to a reply: the processes of a sandbox and what they say to each other."""
