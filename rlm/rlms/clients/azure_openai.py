"""OpenAI's models on Azure, as scripts for rlms name them."""

from .provider import ProviderClient


class AzureOpenAIClient(ProviderClient):
    """OpenAI's models on Azure, at ``azure_endpoint``."""

    backend = "azure_openai"
