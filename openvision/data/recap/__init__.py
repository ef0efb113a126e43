"""Recap-DataComp-1B: join the recaption table with the shards that img2dataset wrote."""
