"""Everything between raw video files and a batch: records, numpy transforms, Grain chains, preparation."""
