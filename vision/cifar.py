"""Networks of the distillation papers that timm does not have, registered with it."""
