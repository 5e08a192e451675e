from tests.helpers.model_fixtures import any_model, encoder, make_model, model

__all__ = ["any_model", "encoder", "make_model", "model"]
