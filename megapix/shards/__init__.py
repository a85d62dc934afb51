"""The contract on disk: what data_prep writes and a run reads."""
