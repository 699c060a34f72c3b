// Vectors of an exported size by transformers.js, as JSON: node consumers.cjs PACKAGES FOLDER TEXT...
const path = require('node:path');
const [packages, folder, ...texts] = process.argv.slice(2);
const load = require('node:module').createRequire(path.join(path.resolve(packages), 'here.cjs'));
const { AutoModel, AutoTokenizer, env, pipeline } = load('@huggingface/transformers');

env.allowRemoteModels = false;
env.localModelPath = path.dirname(path.resolve(folder)) + path.sep;

async function main() {
  const name = path.basename(folder);
  const found = {};
  for (const dtype of ['fp32', 'q8']) {
    const embed = await pipeline('feature-extraction', name, { dtype });
    for (const pooling of ['mean', 'cls']) {
      found[`pipeline ${pooling} ${dtype}`] = (await embed(texts, { pooling, normalize: true })).tolist();
    }
    const tokenizer = await AutoTokenizer.from_pretrained(name);
    const model = await AutoModel.from_pretrained(name, { dtype });
    const output = await model(await tokenizer(texts, { padding: true, truncation: true }));
    found[`AutoModel ${dtype}`] = output.sentence_embedding.tolist();
  }
  console.log(JSON.stringify(found));
}

main();
