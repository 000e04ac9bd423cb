"""Plan + store -> results: `local` runs steps as child processes of this machine, `worker` is such a child."""
