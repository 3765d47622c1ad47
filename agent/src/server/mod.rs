//! Takes ranks in: attach, ingest, heartbeat.
