from tests.parity_peers import weights as weights
