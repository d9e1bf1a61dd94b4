import sys,time,io,contextlib; sys.path.insert(0,"/work/main")
import federated_learning as fl
def go(name,extra=""):
    t=time.perf_counter(); c=time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        fl.run(fl.parse(f"--dataset digits --model mlp --rounds 2 --name {name} {extra}"))
    print(name, round(time.perf_counter()-t,2), "cpu", round(time.process_time()-c,2))
go("a"); go("b"); go("c","--figures none"); 
import cProfile,pstats
p=cProfile.Profile(); p.enable(); go("d","--figures none"); p.disable()
pstats.Stats(p).sort_stats("cumulative").print_stats(70)
