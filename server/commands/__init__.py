"""One file per `slimoe` command."""
