"""A captioner behind OpenAI's protocol: `openvision serve`. May import what `recaption` may."""
