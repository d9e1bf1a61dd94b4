"""TFF's C++ workers, here and on other machines. Changing an experiment never involves this
package.

`worker` starts one and calls TFF computations in it; `supervisor` is the process around it;
`multi_host` splits a round over several; `ssh` reaches other machines.
"""
