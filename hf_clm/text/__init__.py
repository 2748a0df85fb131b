"""Text and tokens: tokenizers, and chats as their templates write them."""
