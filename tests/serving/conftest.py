from tests.helpers.served_models import adapter, chat_model, exports, predictors

__all__ = ["adapter", "chat_model", "exports", "predictors"]
