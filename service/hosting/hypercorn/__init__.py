"""All that replaces or patches hypercorn; ``patches`` lists each patch, each fault and its removal test."""
