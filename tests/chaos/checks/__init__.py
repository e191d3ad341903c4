"""The promises about prices, the archive, erasures, webhooks and figures."""
