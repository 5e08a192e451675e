from tests.helpers.served_models import adapter, exports, predictors

__all__ = ["adapter", "exports", "predictors"]
