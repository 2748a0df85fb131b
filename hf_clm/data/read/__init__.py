"""Files to records, records to examples."""
