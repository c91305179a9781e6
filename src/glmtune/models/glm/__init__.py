"""The younger family: ChatGLM2-6B, ChatGLM3-6B, GLM-4, GLM-4-0414, GLM-Edge."""
