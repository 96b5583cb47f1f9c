"""HTTP in, tokens out, and the `slimoe` command. It knows no tensor."""
