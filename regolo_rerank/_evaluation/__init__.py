"""What `regolo_rerank.evaluation` is made of."""
