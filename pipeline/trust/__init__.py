"""Trust: keys, signatures over in-toto Statements, and the policy that says what is enough. Everything is offline."""
