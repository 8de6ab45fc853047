"""Token data: packed shards, the manifest that vouches for them, and the order in which training reads them."""
