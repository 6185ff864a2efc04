"""Speech recognition: Whisper tiny.en adapted to accents with SSVD-O."""
