"""Studies of pretrained models: what each reduction costs and loses on real weights."""
